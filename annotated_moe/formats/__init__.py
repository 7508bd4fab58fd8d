# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The modules of `annotated_moe.formats`.
"""

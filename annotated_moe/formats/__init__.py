"""Reading and writing the files that weights come in."""

"""What a compiled program will do, read from the program itself."""

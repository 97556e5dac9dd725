"""Other projects' files, in and out, by tables."""

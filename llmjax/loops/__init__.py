"""The thin loops: one file for each stage that trains, evaluates or generates."""

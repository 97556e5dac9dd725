"""Device meshes, logical axis names and their table, start-up on many hosts."""

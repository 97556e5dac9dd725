"""Pure maths: attention, rotary positions, norms, losses, masked statistics."""

"""Ways to use less memory; each an object that can be taken off."""

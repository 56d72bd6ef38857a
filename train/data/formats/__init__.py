"""Files -> raw arrays, whatever their format."""

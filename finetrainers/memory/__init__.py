"""What stays on the device, and the report of it."""

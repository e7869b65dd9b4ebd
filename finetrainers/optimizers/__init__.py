"""Optimizers by name, what their state weighs, and the ways of holding it that save memory."""

"""Clocks, memory, device facts and the one record that every measurement becomes."""

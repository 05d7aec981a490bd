"""Training one model on several devices at once."""

"""Long contexts on little memory: the switches, the plan of what they save, and the measurement."""

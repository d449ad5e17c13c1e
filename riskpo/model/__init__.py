"""The model as the trainer needs it: head, packing, attention, adapters, memory switches."""

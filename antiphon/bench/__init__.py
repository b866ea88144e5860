"""How the engine does under load, with the clocks of who listens, and beside others."""

"""The jobs of this repository on many machines."""

"""Hydra configs. This file makes them reachable from the console scripts of an installed wheel."""

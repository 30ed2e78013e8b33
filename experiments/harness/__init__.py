"""The training harness: loop, data, models, run folder. It knows psap_core only through callbacks.py."""

"""Run folders: who a run is, and what it leaves behind. Imports no torch."""

"""Everything that trains, logs, or knows a data set."""

"""The methods that PSAP is compared with (METHOD.md, section 6)."""

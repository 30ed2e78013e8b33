"""The methods that PSAP is compared with; each module says where its definition comes from."""

"""The tests: against a real PostgreSQL and a real Valkey that they start themselves."""

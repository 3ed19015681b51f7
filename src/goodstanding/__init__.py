"""Goodstanding tells people who are about to meet whether the other one turns up."""

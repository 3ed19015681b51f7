"""A simulation of the whole product: real code, model servers, virtual time, one seed for everything."""

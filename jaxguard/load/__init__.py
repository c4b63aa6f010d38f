"""`jaxguard load`: how a service behaves under traffic that does not wait for it."""

"""Calls from one server of a job to another: description, registration with the lead, the lead's services."""

"""Link: everything between an update and the wire."""

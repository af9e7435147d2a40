"""One file per resource: read the request, call a room, write the response. No decisions."""

"""What a study found, shown: a table for the terminal, a document for scripts, a picture and a page. Runs no study."""

"""What an evaluation shows: tables, pictures, a page."""

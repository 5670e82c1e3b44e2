"""The report page: one HTML file without any address, from the JSON files of a results folder."""

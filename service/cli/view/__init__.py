"""What commands show: sentences, tables, shaded text, streams, plots, progress."""

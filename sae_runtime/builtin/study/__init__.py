"""What features of the builtin model do: the texts, the measurements and the tables of STUDY.md."""

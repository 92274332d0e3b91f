"""What differs between two models, with what makes it believable: nulls, intervals, controls."""

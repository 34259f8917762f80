"""`kd bench`: what our machinery costs beside bare loops; ratios within one run, medians."""

"""From volumes and reports to a grounded data set: stages that can be stopped and resumed."""

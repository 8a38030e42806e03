"""Programs in which users watch and compare trainings, such as TensorBoard."""

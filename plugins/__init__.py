"""The mathematics of the methods: tensors in, tensors out; knows no Trainer."""

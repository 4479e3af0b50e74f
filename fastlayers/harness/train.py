"""`fastlayers train RECIPE`: the table of recipes."""

COMMANDS = {
    "mlp": ("fastlayers.harness.mlp", "tell two clouds of points apart with a wide perceptron", "demo"),
    "mnist-mlp": ("fastlayers.harness.mnist_mlp", "read handwritten digits with a perceptron", "demo"),
    "mnist-cnn": ("fastlayers.harness.mnist_cnn", "read handwritten digits with a convolutional network", "demo"),
    "text-classification": (
        "fastlayers.harness.text_classification",
        "fine-tune a pretrained BERT on labelled text",
        "demo",
    ),
    "gpt": ("fastlayers.harness.gpt", "train a small GPT from scratch, and let it write", "demo"),
}

"""`fastlayers train RECIPE`: the table of recipes."""

COMMANDS = {
    "text-classification": (
        "fastlayers.harness.text_classification",
        "fine-tune a pretrained BERT on labelled text",
        "demo",
    ),
}

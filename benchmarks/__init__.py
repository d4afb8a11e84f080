"""What attention maps cost: attnx beside plain attention and beside what people use today."""

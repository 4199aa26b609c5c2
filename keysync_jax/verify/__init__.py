"""The verb `verify`: reference cases through our code, number by number."""

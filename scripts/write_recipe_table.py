"""Write the table of results in recipes/README.md, from the results that the recipes record.

python scripts/write_recipe_table.py
"""

from accel_trainer.library import shipped
from accel_trainer.results_table import write_table

if __name__ == "__main__":
    folder = shipped("recipes")
    write_table(folder)
    print(folder / "README.md")

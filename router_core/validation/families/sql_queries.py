"""Write an SQL query, graded by the rows that it returns."""

# ruff: noqa: S608 - queries of our own, kept as text to be shown or compared; none takes input from outside

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.families.names import COMPANIES, PEOPLE, TOWNS
from router_core.validation.graders import SqlGrader

_FRAMES = (
    "Given this SQLite schema:\n\n{schema}\n\nWrite one SQL query: {task}",
    "{schema}\n\n{task} Reply with the SQL only.",
    "My database has these tables.\n```sql\n{schema}\n```\nI need a query. {task}",
    "Translate the request into SQL (SQLite).\nRequest: {task}\nTables:\n{schema}",
)

_SHOP = (
    "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);\n"
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, amount INTEGER, placed_on TEXT);"
)
_STAFF = (
    "CREATE TABLE departments (id INTEGER PRIMARY KEY, name TEXT);\nCREATE TABLE employees (id INTEGER PRIMARY KEY,"
    " name TEXT, department_id INTEGER, salary INTEGER, hired_year INTEGER);"
)


def _shop(rng: Random) -> str:
    cities = rng.sample(TOWNS, 4)
    names = rng.sample(PEOPLE, 9)
    rows = [f"INSERT INTO customers VALUES ({i}, '{name}', '{rng.choice(cities)}');" for i, name in enumerate(names, 1)]
    for i in range(1, 31):
        placed = f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        rows.append(f"INSERT INTO orders VALUES ({i}, {rng.randint(1, 7)}, {rng.randrange(15, 400)}, '{placed}');")
    return _SHOP + "\n" + "\n".join(rows)


def _staff(rng: Random) -> str:
    rows = [f"INSERT INTO departments VALUES ({i}, '{name}');" for i, name in enumerate(rng.sample(COMPANIES, 4), 1)]
    for i, name in enumerate(rng.sample(PEOPLE, 18), 1):
        salary, year = rng.randrange(2100, 8900, 7), rng.randint(2005, 2023)
        rows.append(f"INSERT INTO employees VALUES ({i}, '{name}', {rng.randint(1, 3)}, {salary}, {year});")
    return _STAFF + "\n" + "\n".join(rows)


# The request, a right query, and whether the order of the rows was asked for.
Task = tuple[str, str, bool]


_SHOP_TASKS: tuple[tuple[Task, ...], ...] = (
    (
        (
            "Return the id and amount of every order above {n}.",
            "SELECT id, amount FROM orders WHERE amount > {n}",
            False,
        ),
        ("List the names of all customers in alphabetical order.", "SELECT name FROM customers ORDER BY name", True),
        ("How many orders have an amount of at least {n}?", "SELECT COUNT(*) FROM orders WHERE amount >= {n}", False),
    ),
    (
        (
            "For each city show the city and its number of customers, only where that number is 2 or more.",
            "SELECT city, COUNT(*) FROM customers GROUP BY city HAVING COUNT(*) >= 2",
            False,
        ),
        (
            "Show each customer's name with the total amount of their orders, leaving out customers without orders.",
            "SELECT c.name, SUM(o.amount) FROM customers c JOIN orders o ON o.customer_id = c.id GROUP BY c.id",
            False,
        ),
    ),
    (
        (
            "Show the names of the customers who never placed an order, together with their city.",
            "SELECT name, city FROM customers WHERE id NOT IN (SELECT customer_id FROM orders)",
            False,
        ),
        (
            (
                "For every city show the city and the largest single order amount of its customers; cities without any"
                " order show 0 in the second column."
            ),
            (
                "SELECT c.city, COALESCE(MAX(o.amount), 0) FROM customers c LEFT JOIN orders o ON o.customer_id = c.id"
                " GROUP BY 1"
            ),
            False,
        ),
        (
            (
                "For each month of 2024 that has orders show the month as 'YYYY-MM' and the running total of all"
                " amounts up to and including it, in chronological order."
            ),
            (
                "SELECT m, SUM(s) OVER (ORDER BY m) FROM (SELECT substr(placed_on, 1, 7) AS m, SUM(amount) AS s FROM"
                " orders GROUP BY 1) ORDER BY m"
            ),
            True,
        ),
    ),
)


_STAFF_TASKS: tuple[tuple[Task, ...], ...] = (
    (
        (
            "Names of the employees hired after {year}.",
            "SELECT name FROM employees WHERE hired_year > {year}",
            False,
        ),
        ("What is the highest salary?", "SELECT MAX(salary) FROM employees", False),
    ),
    (
        (
            (
                "Show every department's name with the average salary of its employees, leaving out departments with no"
                " employees."
            ),
            "SELECT d.name, AVG(e.salary) FROM departments d JOIN employees e ON e.department_id = d.id GROUP BY d.id",
            False,
        ),
        (
            "The names and salaries of the {few} best paid employees, the best paid first.",
            "SELECT name, salary FROM employees ORDER BY salary DESC LIMIT {few}",
            True,
        ),
    ),
    (
        (
            "For each department that has employees show the department name and the name of its best paid employee.",
            (
                "SELECT d.name, e.name FROM employees e JOIN departments d ON d.id = e.department_id WHERE e.salary = "
                "(SELECT MAX(salary) FROM employees x WHERE x.department_id = e.department_id)"
            ),
            False,
        ),
        (
            "Names of the employees who earn more than the average of their own department.",
            (
                "SELECT name FROM employees e WHERE salary > (SELECT AVG(salary) FROM employees x WHERE x.department_id"
                " = e.department_id)"
            ),
            False,
        ),
    ),
)


def _draw(rng: Random, level: int) -> Draft:
    setup, schema, tasks = rng.choice([(_shop(rng), _SHOP, _SHOP_TASKS), (_staff(rng), _STAFF, _STAFF_TASKS)])
    task, query, ordered = rng.choice(tasks[level - 1])
    figures = {"n": rng.randrange(60, 320, 10), "year": rng.randint(2005, 2019), "few": rng.randint(2, 5)}
    query = query.format(**figures)
    text = rng.choice(_FRAMES).format(schema=schema, task=task.format(**figures))
    return Draft(text, SqlGrader(setup, query, ordered), f"```sql\n{query};\n```", level, LONG)


SECTIONS = (Section("sql", 18, by_levels(_draw)),)

"""SQL for the lease database, run in the lab, where its path is: `python -I -S database_end.py PATH`.

Each line on standard input is JSON: a list of statements, each with a list of rows of parameters.  They are executed in
order, and the rows that they return are the answer, one line of JSON.  The end of standard input ends it.
"""

import contextlib
import json
import sqlite3
import sys

if __name__ == "__main__":
    # A daemon that writes holds the lock for milliseconds.
    with contextlib.closing(sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)) as database:
        for line in sys.stdin:
            found = []
            for statement, rows in json.loads(line):
                for row in rows:
                    found += database.execute(statement, row).fetchall()
            print(json.dumps(found), flush=True)

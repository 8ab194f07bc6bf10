"""`fastlora serve`: one base and its adapters behind OpenAI's HTTP interface, on this machine's loopback, to try them.

server      what the command starts: model, engine and socket, and how they end
app         HTTP: paths, status codes, streams, clients that go away
bodies      requests and answers as OpenAI writes them
engine      the queue and the thread that owns the model: rows join and leave between steps
batch       a step of the model for rows of any length, each with its adapter
slots       the keys and values of the rows under way
adapters    which names may be asked for, and what a step needs to run them
picking     the next token, greedy or drawn
words       tokens as text, up to a stop string
"""

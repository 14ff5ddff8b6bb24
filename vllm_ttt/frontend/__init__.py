"""The API server's side: whose session a request names, what the answer says about it, and the routes under /v1/ttt."""

"""How good it is: retrieval measures, answers, perplexity. Every figure comes with the convention that makes it comparable.

`trec` queries, judgements and runs; `retrieval` nDCG, recall and accuracy of a retriever; `answers` measures of one answer;
`questions` question files; `qa` EM and F1 of a system; `squad` of predictions written earlier; `perplexity` of texts."""

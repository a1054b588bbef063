// The pieces of a response; returns why it ended.
async function* completion(body, signal) {
  const response = await ask("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let finish = null;
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return finish;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerProblem(500, chunk.error.message);
      finish = chunk.choices[0]?.finish_reason ?? finish;
      const piece = chunk.choices[0]?.delta.content;
      if (piece) yield piece;
    }
  }
  throw new ServerProblem(0, "The connection was lost before the response ended.");
}

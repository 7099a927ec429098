async () => {
  // Ask the page which tab is in front: Gradio also reports "selected" for a restored tab that the visitor has left
  // since, and for the first tab at the start. A choice made before the stored tab is back is the visitor's.
  await new Promise((done) => setTimeout(done, 50));
  const front = __NAMES__.find((name) => document.getElementById('fl-tab-' + name)?.getClientRects().length);
  if (window.flatloraRestored?.has(__KEY__)) localStorage.setItem(__KEY__, front);
  else if (front !== __NAMES__[0]) window.flatloraChosen = front;
  return __NAMES__.flatMap((name) => __TICKING__.includes(name) ? [{__type__: 'update', active: name === front}] : []);
}

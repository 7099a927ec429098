// The keys 1, 2 and 3 press the buttons, unless a field has the focus or the vote is off the screen.
if (!window.flatloraVoteKeys) {
  window.flatloraVoteKeys = true;
  document.addEventListener('keydown', (event) => {
    const id = {1: 'fl-vote-left', 2: 'fl-vote-right', 3: 'fl-vote-tie'}[event.key];
    if (!id || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest('input, textarea, select, [contenteditable=true]')) return;
    const button = document.getElementById(id);
    if (button && button.offsetParent !== null && !button.disabled) button.click();
  });
}

// The search runs in a worker, and browsers start none from file://. There a hidden frame stands in for it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source === this.inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      this.inside.document.open();
      this.inside.document.write(`<body><script>
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = async (...urls) => {
          for (const url of urls) {
            await new Promise((resolve) => {
              document.body.append(Object.assign(document.createElement("script"), { src: url, onload: resolve }));
            });
          }
        };
      </script><script src="${url}"></script></body>`);
      this.inside.document.close();
      this.ready = new Promise((resolve) => { this.inside.onload = resolve; }); // opening a document drops listeners
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}

{{/* What head and worker have in common. Arguments: root, name, pool (its values), data (whether the router runs here), readiness. */}}
{{- define "diptych.pod" -}}
metadata:
  labels:
    {{- include "diptych.podLabels" .root | nindent 4 }}
  annotations:
    # Read when the application starts: another configuration is another cluster.
    diptych/config-sha256: {{ include "diptych.config" .root | sha256sum }}
spec:
  serviceAccountName: {{ include "diptych.serviceAccountName" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .grace }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ .root.Values.runAsUser | int }}
    runAsGroup: {{ .root.Values.runAsUser | int }}
    fsGroup: {{ .root.Values.runAsUser | int }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .pool.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pool.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "diptych.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      env:
        - name: HOME
          value: /tmp
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: HF_HUB_OFFLINE
          value: "1"
        - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
          value: {{ .drain | quote }}
      {{- with .root.Values.providers.keysSecret }}
      envFrom:
        - secretRef:
            name: {{ . }}
      {{- end }}
      resources:
        requests:
          cpu: {{ .pool.cpu | quote }}
          memory: {{ .pool.memory }}
        limits:
          memory: {{ .pool.memory }}
          {{- with .pool.gpus }}
          nvidia.com/gpu: {{ . | int }}
          {{- end }}
      {{- with .readiness }}
      readinessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: config
          mountPath: /etc/diptych
          readOnly: true
        - name: tmp
          mountPath: /tmp
        - name: cache
          mountPath: /cache
        - name: shm
          mountPath: /dev/shm
        {{- if .data }}
        - name: data
          mountPath: /data
        {{- if .root.Values.data.passwordSecret }}
        - name: store-password
          mountPath: /etc/diptych-store
          readOnly: true
        {{- end }}
        {{- end }}
        {{- if .root.Values.models.claimName }}
        - name: models
          mountPath: {{ .root.Values.models.path }}
          readOnly: true
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "diptych.name" .root }}
    - name: tmp
      emptyDir: {}
    - name: cache
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .shm }}
    {{- if .data }}
    - name: data
      {{- if .root.Values.data.claimName }}
      persistentVolumeClaim:
        claimName: {{ .root.Values.data.claimName }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- if .root.Values.data.passwordSecret }}
    - name: store-password
      secret:
        secretName: {{ .root.Values.data.passwordSecret }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- if .root.Values.models.claimName }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ .root.Values.models.claimName }}
        readOnly: true
    {{- end }}
{{- end -}}
